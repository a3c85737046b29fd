"""Read and write files: images, animations, atomic writes, and filter numbers."""
