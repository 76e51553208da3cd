"""A process that reads NRRD and MetaImage: SimpleITK is C++, and ends its process at some headers.

python itk_worker.py FILE IMAGE_IO writes to standard output a line of JSON with the geometry; when it is sent a line,
one with the type of the voxels, and the voxels, the first axis fastest. Instead of either line there may be {"error":
REASON}. It is started as a file, so that it imports nothing but NumPy and SimpleITK.
"""

import json
import os
import sys
from typing import Any


def _serve(path: str, image_io: str) -> None:
    # What ITK prints is no answer, and a file that is /dev/stdin is no command.
    commands, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values).encode() + b"\n")
        answers.flush()

    try:
        import SimpleITK as sitk  # noqa: N813, PLC0415 - an extra; its own customary name

        reader = sitk.ImageFileReader()
        reader.SetFileName(path)
        reader.SetImageIO(image_io)
        reader.ReadImageInformation()
        names = ("Size", "NumberOfComponents", "Spacing", "Origin", "Direction")
        answer({name.lower(): getattr(reader, f"Get{name}")() for name in names})
        if not commands.readline():
            return
        image = reader.Execute()  # the array is of its memory
        voxels = sitk.GetArrayViewFromImage(image)
        answer({"dtype": voxels.dtype.str})
        answers.write(voxels.data)
        answers.flush()
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        answer({"error": reason[-1][:200]})


if __name__ == "__main__":
    _serve(*sys.argv[1:])
