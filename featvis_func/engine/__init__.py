"""One image's functions over a batch of filters: composed, compiled and run on a device."""
