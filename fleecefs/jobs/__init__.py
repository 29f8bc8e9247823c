"""Jobs: what takes long and goes on by itself, with QEMU's statuses and verbs.

status       the tables: which moves are legal, which verb is accepted when
options      what a job is told when it starts
limit        how fast it may copy
progress     how far it is
job          one job: what people and its transaction can do with it
transaction  jobs that end together
registry     all jobs of a mount
"""
