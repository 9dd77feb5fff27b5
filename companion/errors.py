"""The package's own errors: each message says what went wrong and what to do about it."""


class SchemeError(ValueError):
    """A number format that cannot exist, such as nine-bit weights in an int8 container."""


class NothingToQuantize(ValueError):
    """The model holds no layer that the requested quantization could change."""


class UnsupportedModel(ValueError):
    """The model computes something that the requested road cannot carry."""


class UnsupportedBackend(ValueError):
    """This build of PyTorch has no such quantized engine."""


class WrongStage(RuntimeError):
    """A call out of order: prepare, then train, then freeze, then convert."""


class NothingToTrain(RuntimeError):
    """Training would silently do nothing: no parameter can receive a gradient."""


class EmptyLoader(ValueError):
    """The loader gave no batch."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


class CheckpointError(RuntimeError):
    """A checkpoint that does not fit this run, or would be overwritten by it."""


class SourceUnavailable(RuntimeError):
    """A model or data set could not be had from any of the sources that were tried."""


class UnknownLayer(ValueError):
    """A name or pattern that matches no layer of the model."""


class DamagedFile(RuntimeError):
    """A saved model whose bytes are not those that were written."""
