"""A job that ends whatever other process decodes it, as a crash in a codec would."""

import os


class DeadlyJob:
    """Stands for a Job; harmless in the process that made it."""

    def __init__(self, job):
        self.job, self.home = job, os.getpid()

    @property
    def cut(self):
        if os.getpid() != self.home:
            os._exit(11)
        return self.job.cut
