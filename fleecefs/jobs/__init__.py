"""Jobs: what takes long and goes on by itself, with QEMU's statuses and verbs.

status       the tables: which moves are legal, which verb is accepted when
options      what a job is told when it starts
limit        how fast it may copy
progress     how far it is
job          one job: what people and its transaction can do with it
transaction  jobs that end together
registry     all jobs of a mount
target       where a backup goes to
copy         copying a snapshot while the guest goes on
backup       the job that does so
record       where it is remembered
backups      how they begin, or go on
verify       the job that compares a disk with a backup, with compare, differences and
             openbackup
held         what jobs that hold a private snapshot share
"""
