"""Publish the asv dashboard with all its scripts beside it, so that it opens without a network.

    python benchmarks/dashboard.py            asv publish, and the scripts; then: python -m http.server -d html

asv's page loads jQuery, Flot, Bootstrap and others from public networks. Each is fetched once and kept: from its
address where that can be reached, else with `npm pack`, which asks the registry that npm is told to. A file must have
the checksum that the page states of it, unless npm has only another form of it: see `OTHERS`.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
HTML, KEPT = HERE / ".asv/html", HERE / ".asv/vendor"
TAG = re.compile(r'(?P<start><(?:script|link)\b[^>]*?(?:src|href)=")(?P<url>https://[^"]+)"(?P<rest>[^>]*)>')
CHECKSUM = re.compile(r'integrity="(sha\d+)-([^"]+)"')

# The package on npm, and the file in it, of each file that the page loads.
PACKED = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}
# On npm, Flot is not minified, and stupidtable has a later version only.
OTHERS = {"flot@0.8.3", "stupid-table-plugin@1.1.3"}


def download(url: str) -> bytes:
    """A file from its address."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()


def unpack(package: str, path: str) -> bytes:
    """A file of a package on npm."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            return archive.extractfile(f"package/{path}").read()


def check(data: bytes, tag: str, name: str) -> bytes:
    """The data, which must have the checksum that a tag states."""
    stated = CHECKSUM.search(tag)
    if stated and base64.b64encode(hashlib.new(stated[1], data).digest()).decode() != stated[2]:
        raise ValueError(f"{name} does not have the checksum that asv's page states")
    return data


def fetch(url: str, tag: str) -> bytes:
    """A file of the page, from one place or the other."""
    name = url.rpartition("/")[2]
    try:
        return check(download(url), tag, name)
    except OSError as error:
        package, path = PACKED.get(name, (None, None))
        if package is None or shutil.which("npm") is None:
            sys.exit(f"cannot download {url} ({error}), nor take it from npm: run this once where there is a network")
    try:
        data = unpack(package, path)
    except subprocess.CalledProcessError as error:
        sys.exit(f"neither {url} nor npm's {package} can be downloaded: {error.stderr.decode().strip()}")
    return data if package in OTHERS else check(data, tag, name)


def bring(tag: re.Match) -> str:
    """Put the file of a tag into html/vendor; the tag that names it there."""
    name = tag["url"].rpartition("/")[2]
    kept = KEPT / name
    if not kept.exists():
        print(f"fetching {name}")
        data = fetch(tag["url"], tag[0])
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data)
    shutil.copy(kept, HTML / "vendor")
    rest = re.sub(r' (integrity|crossorigin|referrerpolicy)="[^"]*"', "", tag["rest"])
    return f'{tag["start"]}vendor/{name}"{rest}>'


def main() -> None:
    subprocess.run([sys.executable, "-m", "asv", "publish"], cwd=HERE, check=True)
    (HTML / "vendor").mkdir()
    page = HTML / "index.html"
    page.write_text(TAG.sub(bring, page.read_text()))
    print(f"{page} needs no network; serve it: python -m http.server -d {HTML}")


if __name__ == "__main__":
    main()
