"""Deploy vision-language models from prebuilt engine directories."""
