"""Honest work: reads its input beside itself, counts, and leaves a report in the cell's work directory."""

import collections
import json
import os

here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "poem.txt"), encoding="utf-8") as file:
    words = collections.Counter(file.read().lower().replace(",", "").replace(".", "").split())

with open("/work/report.json", "w", encoding="utf-8") as file:
    json.dump({"words": words.total(), "most": words.most_common(3)}, file)

print(f"read   poem.txt: {words.total()} words, the most frequent is {words.most_common(1)[0][0]!r}")
print("wrote  /work/report.json")
