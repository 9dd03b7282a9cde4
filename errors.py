"""Every exception sageLLM raises on purpose.

SageLLMError
├── ConfigError               a configuration value is wrong                      (exit 78)
│   ├── PipelineError         a YAML pipeline is wrong: carries every problem     (exit 78)
│   └── NotAvailableError     a real option that this version cannot serve yet
├── ModelError                a checkpoint cannot be resolved, read or built
│   ├── ModelNotFoundError    the id is neither a folder, nor cached, nor downloadable
│   └── CheckpointError       files are missing, torn or of a shape that does not fit
├── RequestError              one request is bad; it becomes a dead letter, the stream goes on
├── SourceChangedError        the input is not the file that the output was begun from
├── OutputLockedError         another process writes this output
├── FlowError                 the running dataflow failed
│   ├── OperatorFailedError   an operator passed its restart limit
│   └── ErrorRatioExceededError  too large a share of records failed               (exit 1)
├── KVCacheError              blocks ran out, or the cache's books do not balance
├── ExecutorLostError         a worker's process died or hangs, and with it the contents of its KV pool
├── GateError                 a run missed a configured figure                    (exit 1)
└── EngineClosedError         the engine was shut down, has failed or was never initialized
"""


class SageLLMError(Exception):
    """Base of all errors raised on purpose by sageLLM."""

    exit_code = 1


class ConfigError(SageLLMError):
    """A configuration value is wrong; the message says what to write instead."""

    exit_code = 78


class PipelineError(ConfigError):
    """A pipeline file is wrong. `problems` holds one line per problem, each `file:line:col: message`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class NotAvailableError(ConfigError):
    """The option exists in the design, but this version cannot serve it; never ignored silently."""


class ModelError(SageLLMError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError):
    """No such model: not a folder, not in the hub's cache, and not downloadable from here."""


class CheckpointError(ModelError):
    """A checkpoint's files are missing, torn, or do not fit its config.json."""


class RequestError(SageLLMError):
    """One request is bad. The record becomes a dead letter and the stream goes on. `param` is the first bad field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class SourceChangedError(SageLLMError):
    """The input file is not the one from which the existing output was begun."""


class OutputLockedError(SageLLMError):
    """Another process holds the lock of this output file."""


class FlowError(SageLLMError):
    """The running dataflow failed."""


class OperatorFailedError(FlowError):
    """An operator failed more often than its restart policy allows."""


class ErrorRatioExceededError(FlowError):
    """The share of failed records passed `max_error_ratio`."""


class KVCacheError(SageLLMError):
    """KV blocks ran out where that must not happen, or an integrity check failed."""


class ExecutorLostError(SageLLMError):
    """The process that runs a worker's model died or hangs. The worker starts another one, a few times in a row."""


class GateError(SageLLMError):
    """A run missed a figure that `benchmark.enable_gates` makes it reach."""


class EngineClosedError(SageLLMError):
    """The engine is not running: not initialized, shut down, or failed."""
