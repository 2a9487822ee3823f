"""What a fitted curvature tells about examples and directions: influence, similarity, novelty, spectra."""
