"""Formats of other programs: Hugging Face's folders, DeepSpeed's JSON files."""
