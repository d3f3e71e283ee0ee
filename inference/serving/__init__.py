"""A server of completions: requests in, texts out as they come. Over HTTP, by OpenAI's API."""
