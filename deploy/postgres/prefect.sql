-- Run once, when the database server is initialised; the database of the archiver is made by the image.
CREATE DATABASE prefect;
