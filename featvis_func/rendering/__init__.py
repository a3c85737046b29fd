"""Names and options in, a :class:`~featvis_func.Result` out."""
