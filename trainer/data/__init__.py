"""From files of preference rows to batches of token ids."""
