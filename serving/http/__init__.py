"""OpenAI-compatible HTTP, KServe's REST and a page, over one `Service`."""
