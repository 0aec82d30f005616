"""Fashion-MNIST under a budget of patches: what a picture shows, at two resolutions, at one price."""
