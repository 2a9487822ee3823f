"""Image data, shared by the examples on images: digits of scikit-learn, IDX files (MNIST, Fashion-MNIST), the hub."""
