"""qcow2 files, version 3: read by QEMU's tools, and theirs by us.

Dirty bitmaps:

file         what a file has to be able to do
header       the header: the one sector that decides what is in the file
bitmaps      bitmap directory, bitmap tables, bits
clusters     which clusters are in use
counts       their reference counts
contents     reading a file, checked in all its parts
container    changing one, so that a crash at any write loses nothing

Backups as images, which use header, file and counts too:

mapping      from the clusters of a disk to those of a file
backing      the backing file: its name and its format
imagefile    what the file of a new image has to be able to do
tables       the tables of a new image
image        a new image, filled in any order
layers       the files of a backup: what each has of the disk
chain        reading an image with all its backing files
"""
