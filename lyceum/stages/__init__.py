"""The papers, one file each: every module here is one stage of schooling, written against `lyceum.train.stage`."""
