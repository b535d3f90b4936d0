"""Using a trained model: loading it and generating text with it."""
