"""decode_proposals on a CUDA device: streams, no waiting, graphs, more than one device."""

import pytest
import torch
from test_decode_proposals import maps, sizes

from fastrcnn.ops import decode_proposals

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernel(need_kernel):
    need_kernel("decode_proposals", "cuda")


def on_gpu(device: str = "cuda"):
    """As many anchors as an image of 800 x 1344 has."""
    shapes = [(3, -(-800 // s), -(-1344 // s)) for s in (4, 8, 16, 32, 64)]
    image_sizes = torch.tensor([[800.0, 1300], [640, 1344]], device=device)
    return *maps(device, 2, shapes), [4, 8, 16, 32, 64], image_sizes, 1000


@pytest.mark.parametrize("nms_pre", [1000, 5000, 0])
def test_runs_on_the_current_stream_without_waiting_for_the_device(nms_pre):
    logits, *rest = on_gpu()
    rest[-1] = nms_pre
    expected = decode_proposals(logits, *rest)
    late = [torch.zeros_like(x) for x in logits]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for x, y in zip(late, logits):
                x.copy_(y)  # done only when the stream gets there
            actual = decode_proposals(late, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("nms_pre", [1000, 5000, 0])
def test_is_captured_in_a_graph(nms_pre):
    args = *on_gpu()[:-1], nms_pre
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decode_proposals(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_proposals(*args)
    for logits in args[0]:
        logits.copy_(logits.flip(0))
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, decode_proposals(*args)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_answers_on_the_device_of_its_input():
    torch.manual_seed(1)
    first = decode_proposals(*on_gpu())
    torch.manual_seed(1)
    second = decode_proposals(*on_gpu("cuda:1"))
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second))


def test_cuda_has_a_limit_of_eight_levels():
    shapes = [(1, 2, 2)] * 9
    with pytest.raises(RuntimeError, match="at most 8 levels"):
        decode_proposals(*maps("cuda", 1, shapes), [8] * 9, sizes("cuda", 1), 5)
