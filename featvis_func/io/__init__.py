"""Files and formats: atomic writes, photographs, PNG, animations, lists of filters."""
