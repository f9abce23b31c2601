-- The two roles of a fleet, each with no more than it needs. As a superuser:
--
--   createdb perfit
--   psql --single-transaction --set=ON_ERROR_STOP=1 --file=deploy/postgres/roles.sql perfit
--   psql --command='\password perfit_enrolment' --command='\password perfit_replica' perfit
--
-- The enrolling server makes the tables when it first starts, and may add to them after an update of perfit. Run
-- this again after each, and start replicas then. What one role made before there were two goes to enrolment.

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['perfit_enrolment', 'perfit_replica'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN', name);
        END IF;
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), name);
    END LOOP;
END $$;

CREATE SCHEMA IF NOT EXISTS perfit;
ALTER SCHEMA perfit OWNER TO perfit_enrolment;
GRANT USAGE ON SCHEMA perfit TO perfit_replica;

DO $$
DECLARE
    name text;
BEGIN
    FOR name IN
        SELECT tablename FROM pg_tables WHERE schemaname = 'perfit' AND tableowner <> 'perfit_enrolment'
    LOOP
        EXECUTE format('ALTER TABLE perfit.%I OWNER TO perfit_enrolment', name);
    END LOOP;
    IF to_regclass('perfit.devices') IS NULL THEN
        RAISE NOTICE 'there are no tables yet: start the enrolling server, then run this again';
        RETURN;
    END IF;

    REVOKE ALL ON ALL TABLES IN SCHEMA perfit FROM perfit_replica;
    GRANT SELECT ON perfit.meta TO perfit_replica;
    -- Who may call: no label, and no date of a certificate.
    GRANT SELECT (identity, used, revoked, superseded, sequence) ON perfit.devices TO perfit_replica;
    -- Which certificates were used; and a device that leaves.
    GRANT UPDATE (used, revoked, superseded, sequence) ON perfit.devices TO perfit_replica;
    GRANT SELECT, UPDATE (sequence) ON perfit.counters TO perfit_replica;
    -- Once its certificate was used, a device's enrolment cannot be asked for again.
    GRANT SELECT (identity), DELETE ON perfit.enrolments TO perfit_replica;

    -- A replica can revoke, and welcome nobody again. The owner of a table is not bound by these.
    ALTER TABLE perfit.devices ENABLE ROW LEVEL SECURITY;
    DROP POLICY IF EXISTS replica_reads ON perfit.devices;
    CREATE POLICY replica_reads ON perfit.devices FOR SELECT TO perfit_replica USING (true);
    DROP POLICY IF EXISTS replica_writes ON perfit.devices;
    CREATE POLICY replica_writes ON perfit.devices FOR UPDATE TO perfit_replica
        USING (revoked IS NULL) WITH CHECK (true);
END $$;
