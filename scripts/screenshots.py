"""Pictures of pages in Chromium (Qt WebEngine): docs/report.png and docs/compare.png, and what a phone and dark mode make of them.

pip install PyQt6-WebEngine
python scripts/screenshots.py docs/report.png=w4/report.html#engines docs/compare.png=compare.html#recipes [--also FOLDER]

Every page is opened 1280 and 390 pixels wide, light and dark, with everything folded out. Exits with 1 if one is wider than its window or asks for
anything but itself. Pictures named before ``=`` are of 1280 pixels in light mode, up to the section behind ``#``; `--also` keeps all others.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

WIDTHS = (1280, 390)
TALLEST = 8000
MEASURE = """(() => {
  const out = each => !each.closest('.scroll, pre, svg') && each.getBoundingClientRect().right > innerWidth + 1;
  const over = [...document.querySelectorAll('body *')].filter(out);
  return JSON.stringify({width: document.documentElement.scrollWidth, window: innerWidth, height: document.documentElement.scrollHeight,
    dark: matchMedia('(prefers-color-scheme: dark)').matches, over: over.slice(0, 5).map(each => each.outerHTML.slice(0, 120)),
    tops: Object.fromEntries([...document.querySelectorAll('h2[id]')].map(each => [each.id, Math.floor(each.getBoundingClientRect().top)])),
    fetched: performance.getEntriesByType('resource').map(each => each.name)});
})()"""
BARE = "document.head.append(Object.assign(document.createElement('style'), {textContent: 'html::-webkit-scrollbar { display: none }'}));"
UNFOLD = "document.querySelectorAll('details').forEach(each => each.open = true);"


def take(page: Path, width: int, unfold: bool, picture: Path) -> dict[str, object]:
    """Open `page` in a window of that width, write `picture` of all of it, and tell what its layout has come to."""
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import qWebEngineChromiumVersion
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(width, 900)
    view.show()
    told: dict[str, object] = {"chromium": qWebEngineChromiumVersion()}

    def measured(found: str) -> None:
        told.update(json.loads(found))
        view.resize(width, min(int(str(told["height"])), TALLEST))
        QTimer.singleShot(200, wait)

    def wait() -> None:
        view.page().runJavaScript("innerHeight", lambda height: QTimer.singleShot(*((2500, finished) if height == view.height() else (200, wait))))

    def finished() -> None:
        view.grab().save(str(picture))
        application.quit()

    view.loadFinished.connect(lambda _: view.page().runJavaScript(BARE + (UNFOLD if unfold else "") + MEASURE, measured))
    view.load(QUrl.fromLocalFile(str(page.resolve())))
    application.exec()
    return told


def shot(page: Path, width: int, dark: bool, unfold: bool, picture: Path) -> dict[str, object]:
    """`take` in a process of its own: a browser has one colour scheme."""
    flags = "--no-sandbox --disable-gpu" + (" --blink-settings=preferredColorScheme=0" if dark else "")
    environment = os.environ | {"QT_QPA_PLATFORM": "offscreen", "QT_QUICK_BACKEND": "software", "QTWEBENGINE_CHROMIUM_FLAGS": flags}
    words = [sys.executable, __file__, "--take", str(page), str(width), str(int(unfold)), str(picture)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"the browser failed on {page}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cut(picture: Path, top: int) -> None:
    from PyQt6.QtGui import QImage

    image = QImage(str(picture))
    image.copy(0, 0, image.width(), min(top, image.height())).save(str(picture))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", metavar="PICTURE=PAGE[#SECTION]")
    parser.add_argument("--also", type=Path, help="folder for the pictures of phones, dark mode and everything folded out")
    options = parser.parse_args()
    bad = 0
    for each in options.pages:
        named, _, rest = each.partition("=")
        picture, page, section = Path(named), Path(rest.partition("#")[0]), rest.partition("#")[2]
        told = shot(page, WIDTHS[0], False, False, picture)
        print(f"{picture}: Chromium {told['chromium']}, {told['width']} x {told['height']}")
        if section:
            cut(picture, dict(told["tops"])[section])  # type: ignore[call-overload]
        for width in WIDTHS:
            for dark in (False, True):
                folder = options.also or picture.parent
                other = folder / f"{picture.stem}-{width}-{'dark' if dark else 'light'}.png"
                told = shot(page, width, dark, True, other)
                if not options.also:
                    other.unlink()
                wrong = [f"elements reach out: {told['over']}"] if told["over"] else []
                wrong += [f"is {told['width']} pixels wide"] if int(str(told["width"])) > int(str(told["window"])) else []
                wrong += [f"asks for {told['fetched']}"] if told["fetched"] else []
                wrong += ["is not in the colours asked for"] if told["dark"] is not dark else []
                print(f"{page} in {width} pixels, {'dark' if dark else 'light'}: {'; '.join(wrong) or 'fits, and asks for nothing'}")
                bad += bool(wrong)
    return int(bad > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--take"]:
        print(json.dumps(take(Path(sys.argv[2]), int(sys.argv[3]), bool(int(sys.argv[4])), Path(sys.argv[5]))))
    else:
        raise SystemExit(main())
