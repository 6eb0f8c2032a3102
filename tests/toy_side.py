"""A side of nothing but NumPy, for the tests of the benchmarks' protocol: it does what its options say."""

import os
import time

import numpy as np

from benchmarks.sides.serving import Side, serve


class Toy(Side):
    def __init__(self, request):
        print("a library that greets on standard output")
        if request.get("refuses"):
            raise ImportError("no such library")
        self.request, self.versions, self.runs = request, {"toy": "1.0"}, 0

    def feed(self, images, labels):
        self.images = images

    def run(self):
        self.runs += 1
        if self.runs == self.request.get("dies_at"):
            print("out of memory", flush=True)
            os._exit(7)
        if self.request.get("order"):
            with open(self.request["order"], "a") as file:
                file.write(self.request["letter"])
        if self.request.get("megabytes"):
            np.ones(self.request["megabytes"] * 2**20, np.uint8).sum()
        time.sleep(self.request.get("seconds", 0))

    def outputs(self):
        erring = len(self.images) == self.request.get("error_at", len(self.images))
        return self.images.mean((1, 2)) * (1 + (self.request.get("error", 0) if erring else 0))


if __name__ == "__main__":
    serve(Toy)
