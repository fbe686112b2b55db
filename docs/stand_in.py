"""Write digits in place of a reader's own images, for docs-test: train/, labels.csv and old-NNNN.tar.gz."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

IMAGES = 40


def main() -> None:
    digits = load_digits()
    rows = []
    with tarfile.open("old-0000.tar.gz", "w:gz") as first, tarfile.open("old-0001.tar.gz", "w:gz") as second:
        for i, (grey, label) in enumerate(zip(digits.images[:IMAGES], digits.target)):
            path = Path("train", str(label), f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((grey * 15).astype("uint8")).convert("RGB").resize((320, 280)).save(path)
            rows.append(f"{path},{label}\n")
            for name, content in ((f"{i}.jpg", path.read_bytes()), (f"{i}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                (first if i % 2 else second).addfile(member, io.BytesIO(content))
    Path("labels.csv").write_text("".join(rows))


if __name__ == "__main__":
    main()
