"""A trained run behind HTTP: OpenAI's chat completions and a page in the browser."""
