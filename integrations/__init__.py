"""sageLLM inside other systems. Each needs an extra of its own, and nothing else of sageLLM imports from here."""
