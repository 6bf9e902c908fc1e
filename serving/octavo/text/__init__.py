"""L3: tokeniser, chat template, detokeniser and stop strings. No torch."""
