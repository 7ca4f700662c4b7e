"""What `model.generate(..., custom_generate=REPOSITORY, trust_remote_code=True)` runs: several tokens per call."""

try:
    import ptp
except ImportError as error:
    raise ImportError("this adapter needs the Python package parallel-token-prediction (ptp)") from error


def generate(model, **arguments):
    return ptp.generate_of_repository(model, **arguments)
