"""What only a CPU gains from. Without this folder, and its one import, everything else works as before, more slowly."""
