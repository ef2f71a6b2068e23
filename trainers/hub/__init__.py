"""Students and head maps on the Hub: card, staging, checks, upload, reload."""
