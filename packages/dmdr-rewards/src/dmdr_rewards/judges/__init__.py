"""The rewards that ask a vision-language model over HTTP."""
