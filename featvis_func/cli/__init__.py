"""The command line, ``featvis``."""
