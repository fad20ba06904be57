"""What the files of a model may say: values that no model has, and what is at fault where one cannot be made."""
