"""Serving: many requests at a time over one engine, in this process or through the OpenAI protocol."""

if __name__ == "serve":
    raise ImportError("the import name is lowbit: write lowbit.serve instead of serve")
