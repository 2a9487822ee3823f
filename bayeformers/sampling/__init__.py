"""Many passes of one model: draws in turn, the shared prefix, private views, generators left alone."""
