"""From files to token ids: reading, format detection, templates and loss masks."""
