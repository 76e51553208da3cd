"""A process that decodes compressed DICOM pixels: the decoders are C++, and abort at some damaged files.

It is started as a file, so that it imports nothing but NumPy and pydicom. Messages in both directions are a length of
eight bytes and so much content: a DICOM file in; b"+" and an .npy file, or b"-" and a reason, out.
"""

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
from typing import IO, Any

_SECONDS, _BYTES_PER_SECOND = 120, 1e6  # for one file; what takes longer hangs


class Decoder:
    """Decodes in another process, which is started when it is first needed, and again after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, content: bytes) -> Any:
        """The stored values of a DICOM file, as an array.

        Raises:
          ValueError: it cannot be decoded, with the reason.
        """
        import numpy as np  # noqa: PLC0415 - the worker imports it when it starts

        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = start_watchdog(process, len(content))
        try:
            _send(process.stdin, content)
            answer = _receive(process.stdout)
        except OSError:
            answer = None
        finally:
            watchdog.cancel()
        if answer is None:
            self.close()
            raise ValueError("the decoder gave up on it")
        if answer[:1] == b"-":
            raise ValueError(answer[1:].decode(errors="replace"))
        return np.load(io.BytesIO(answer[1:]), allow_pickle=False)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(OSError):
                self._process.communicate()
            self._process = None


def start_watchdog(process: "subprocess.Popen[bytes]", size: int) -> threading.Timer:
    """Kills the process where it has not read a file of that many bytes in time; to be cancelled when it has."""
    watchdog = threading.Timer(_SECONDS + size / _BYTES_PER_SECOND, process.kill)
    watchdog.start()
    return watchdog


def _send(stream: IO[bytes], content: bytes) -> None:
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    """A message; None at the end of the stream."""
    length = stream.read(8)
    if len(length) < 8:
        return None
    size = struct.unpack("<Q", length)[0]
    content = stream.read(size)
    return content if len(content) == size else None


def _serve() -> None:
    import warnings  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415
    import pydicom  # noqa: PLC0415
    from pydicom.pixels.utils import pixel_array  # noqa: PLC0415

    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the decoders print is no answer
    while (content := _receive(sys.stdin.buffer)) is not None:
        try:
            values = np.asarray(pixel_array(pydicom.dcmread(io.BytesIO(content)), decoding_plugin="gdcm"))
            file = io.BytesIO()
            np.save(file, values, allow_pickle=False)
            _send(answers, b"+" + file.getvalue())
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            _send(answers, b"-" + reason[0].encode()[:300])


if __name__ == "__main__":
    _serve()
