"""What a person sees: tables, progress and previews."""
