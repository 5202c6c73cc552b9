"""Language models from files: folders as transformers write them, adapters, tokenised documents, and examples made of these."""
