-- Prefect's migrations make trigram indexes, which speed up its searches for a part of a name. They need the
-- pg_trgm extension, and the PostgreSQL of the wheel has been built without it. This one has the operator class
-- those indexes name, but no operator in it: the indexes can be made and kept, no query ever uses them, and such
-- searches read the table instead. Their answers are the same.
--
-- void_in is PostgreSQL's own function that does nothing and returns zero. As the extraction of keys it says
-- "no keys", which GIN has a place for: each row is filed as an empty item.

CREATE FUNCTION gin_extract_value_trgm(text, internal, internal) RETURNS internal
    LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE AS 'void_in';

CREATE FUNCTION gin_extract_query_trgm(text, internal, int2, internal, internal, internal, internal) RETURNS internal
    LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE AS 'void_in';

CREATE FUNCTION gin_trgm_consistent(internal, int2, text, int4, internal, internal, internal, internal) RETURNS bool
    LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE AS 'void_in';

CREATE OPERATOR CLASS gin_trgm_ops FOR TYPE text USING gin AS
    FUNCTION 2 gin_extract_value_trgm(text, internal, internal),
    FUNCTION 3 gin_extract_query_trgm(text, internal, int2, internal, internal, internal, internal),
    FUNCTION 4 gin_trgm_consistent(internal, int2, text, int4, internal, internal, internal, internal);
