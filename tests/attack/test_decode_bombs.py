"""Images that take a decoder far longer than plain ones: refused, or bounded, and everybody else is served."""

import resource
import signal
import time

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image

import hostile_images as hostile
from heatlens import Client
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from image_files import saved
from messages import Details, distinct
from server_process import until, wait_settled
from server_toml import server_toml

pytestmark = pytest.mark.serial

SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
PATIENCE_S = 100
OPTIONS = [("grpc.enable_retries", 0)]
APART = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
BUSY, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def channels():
    """Channels that are closed when the test is over."""
    made = []
    yield made
    for channel in made:
        channel.close()


@pytest.fixture
def attacked(launch, channels):
    """A server of the given keys, and a stub that sends it files: `server, send = attacked(...)`."""

    def start(**keys):
        server = launch(server_toml(**keys))
        wait_settled(server.address)
        channels.append(grpc.insecure_channel(server.address, options=OPTIONS))
        stub = explain_pb2_grpc.ExplainServiceStub(channels[-1])
        # What is loaded and learned by the first calls is not counted below.
        with Client(server.address) as client:
            client.explain(distinct(1)[0], timeout=PATIENCE_S)

        def send(encoded):
            return stub.Explain.future(pb.ExplainRequest(image=pb.Image(encoded=encoded)), timeout=PATIENCE_S)

        return server, send

    return start


def cpu_s(server):
    """What a server's process has used, in seconds."""
    used = psutil.Process(server.process.pid).cpu_times()
    return used.user + used.system


def wait_decoding(server, before_s):
    """Wait until a server is at work on what it was sent."""
    deadline = time.monotonic() + PATIENCE_S
    while cpu_s(server) < before_s + 0.3:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def largest(side_px):
    """The dearest progressive JPEG of a size that is accepted: all its passes but a few are the attacker's."""
    return hostile.jpeg_of_scans(side_px, side_px, 18)


def outcome(call):
    """The status of a call, and its reason."""
    error = call.exception(PATIENCE_S)
    if error is None:
        return "OK", ""
    details = Details.of(error)
    return error.code(), "" if details is None else details.info.reason


def bombs(sized):
    """Files, each of which took a core from seconds to minutes, by name."""
    many, side_px = sized(300_000, 1_300_000), sized(4_000, 8_000)
    overlapping = hostile.empty_deflate(sized(300_000, 2_000_000), bytes(64))
    return {
        "scans": hostile.jpeg_of_scans(side_px, side_px, sized(800, 4_000)),
        "segments": hostile.jpeg_with(SMALL, hostile.jpeg_segment(0xFE) * 3 * many),
        "chunks": hostile.png_with(SMALL, hostile.png_chunk(b"teXt") * many),
        "empty data": hostile.png_of_empty_data(SMALL, many),
        "blocks": hostile.gif_with_comments(SMALL, 6 * many),
        "strips": hostile.tiff_of_strips(64, sized(20_000, 60_000), overlapping, 8),
    }


def test_bombs_are_refused_for_next_to_nothing(attacked, sized):
    server, send = attacked(max_image_pixels=sized(16_000_000, 64_000_000))
    files = bombs(sized)
    assert all(len(bomb) < 16 << 20 for bomb in files.values())
    before_s = cpu_s(server)
    assert {name: outcome(send(bomb)) for name, bomb in files.items()} == dict.fromkeys(
        files, (INVALID, "IMAGE_TOO_COMPLEX")
    )
    # Without the walk each of most of them takes longer than all may take here.
    assert cpu_s(server) - before_s < 0.5 * len(files)


def test_what_decoders_need_not_see_costs_nothing(attacked, sized):
    server, send = attacked()
    fill = hostile.jpeg_with(SMALL, b"\xff" * sized(4_000_000, 16_000_000))
    texts = hostile.png_with(SMALL, hostile.packed_text(8_000_000) * sized(900, 1_900))
    entries = hostile.png_with(SMALL, hostile.png_chunk(b"eXIf", hostile.exif(3, filler_entries=60_000)))
    before_s = cpu_s(server)
    assert [outcome(send(encoded)) for encoded in (fill, texts, entries)] == [("OK", "")] * 3
    assert cpu_s(server) - before_s < 2


def test_small_images_are_answered_before_large_ones_that_came_first(attacked, sized):
    side_px, count = sized(4_000, 8_000), 6
    server, send = attacked(max_image_pixels=side_px**2, decode_threads=2, max_decoding_bytes=1 << 40)
    before_s = cpu_s(server)
    dear = largest(side_px)
    large = [send(dear) for _ in range(count)]
    wait_decoding(server, before_s)
    with Client(server.address) as client:
        for image in distinct(6):
            assert client.explain(image, timeout=PATIENCE_S).explanations
    # One after the other, as they came, at most two would be left.
    assert sum(not call.done() for call in large) > 2
    assert [outcome(call) for call in large] == [("OK", "")] * count


def test_small_images_pass_those_that_are_not_very_large_from_as_many_connections(attacked, channels, sized):
    server, _ = attacked(decode_threads=2)
    count = sized(16, 48)
    # 47 million samples, a third of a second, and some kilobytes.
    request = pb.ExplainRequest(image=pb.Image(encoded=saved(Image.new("RGB", (4_000, 3_900)), "PNG")))
    ways = [grpc.insecure_channel(server.address, options=APART) for _ in range(count)]
    channels.extend(ways)
    for way in ways:
        grpc.channel_ready_future(way).result(PATIENCE_S)
    before_s = cpu_s(server)
    calls = [explain_pb2_grpc.ExplainServiceStub(way).Explain.future(request, timeout=PATIENCE_S) for way in ways]
    wait_decoding(server, before_s)
    with Client(server.address) as client:
        assert client.explain(distinct(1)[0], timeout=PATIENCE_S).explanations
    # In turns of connections it would come last.
    assert sum(not call.done() for call in calls) > count // 2
    assert [outcome(call) for call in calls] == [("OK", "")] * count


def test_large_images_beyond_the_memory_for_them_are_told_to_come_again(attacked, sized):
    _, send = attacked(max_decoding_bytes=300_000_000)
    flat = saved(Image.new("RGB", (5_000, 5_000)), "JPEG")
    calls = [send(flat) for _ in range(sized(6, 60))]
    outcomes = [outcome(call) for call in calls]
    assert set(outcomes) == {("OK", ""), (BUSY, "IMAGE_MEMORY_FULL")}
    assert all(Details(call.exception()).pushback_ms for call in calls if call.exception())
    assert outcome(send(flat)) == ("OK", "")


def test_good_images_are_not_said_to_be_corrupt_where_memory_is_short(attacked, sized):
    server, send = attacked(decode_threads=4)
    process = psutil.Process(server.process.pid)
    files = [saved(Image.new("RGB", (5_000, 5_000)), "JPEG", progressive=way) for way in (False, True)]
    # So that all threads have begun. An image of many pixels would leave its memory to the allocator.
    for file in (saved(SMALL, "PNG"), hostile.jpeg_of_scans(1_000, 1_000, 30)):
        assert [outcome(call) for call in [send(file) for _ in range(40)]] == [("OK", "")] * 40
    # Room for one of the images, and not for all.
    limit = process.memory_info().vms + (200 << 20)
    process.rlimit(psutil.RLIMIT_AS, (limit, limit))
    for _ in range(sized(3, 20)):
        outcomes = [outcome(call) for call in [send(one) for one in files * 4]]
        assert set(outcomes) <= {("OK", ""), (BUSY, "IMAGE_MEMORY_FULL")}, server.log()
        # The memory of those that were answered is free in a moment.
        until(lambda: outcome(send(files[0])) == ("OK", ""))
    with Client(server.address) as client:
        assert client.explain(distinct(1)[0], timeout=PATIENCE_S).explanations


def test_a_server_that_is_told_to_end_does_not_wait_for_decoders(attacked, sized):
    server, send = attacked(grace_s=0.1, decode_threads=2)
    dear = largest(8_000)
    before_s = cpu_s(server)
    assert outcome(send(dear)) == ("OK", "")
    one_s = cpu_s(server) - before_s
    calls = [send(dear) for _ in range(3)]
    wait_decoding(server, before_s + one_s)
    server.process.send_signal(signal.SIGTERM)
    told_s, reaped_s = cpu_s(server), resource.getrusage(resource.RUSAGE_CHILDREN)
    assert server.process.wait(PATIENCE_S) == 0
    reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
    used_s = reaped.ru_utime + reaped.ru_stime - reaped_s.ru_utime - reaped_s.ru_stime
    # Two were being decoded and one waited.
    assert used_s - told_s < one_s
    assert {call.exception(PATIENCE_S).code() for call in calls} <= {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
    }
