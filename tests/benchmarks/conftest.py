import pytest
import torch


@pytest.fixture(autouse=True)
def one_quiet_cpu_thread(monkeypatch):
    """Fused modules on their plain path, whatever the environment says, and one thread: float64 depthwise convolutions
    run channel by channel on a CPU, and threads would only wait for each other.
    """
    for name in ("TRITON_INTERPRET", "EFFKERNELS_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
