"""How the bundled demo model is made: corpus, tokenizer, training, quantised export and evaluation.

Tools only: nothing in the server imports this package. It may use transformers; the server may not.
"""
