"""The engine's own errors."""


class EngineError(ValueError):
    """A request that cannot be served, told so that the caller can change it; the engine stays usable."""
