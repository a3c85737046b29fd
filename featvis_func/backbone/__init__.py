"""A module as a pure function of its weights and images, computed no further than the layers asked for."""
