SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.api_keys (
    id character varying(16) NOT NULL,
    "user" character varying(100) NOT NULL,
    hash character varying(64) NOT NULL,
    scopes json NOT NULL,
    run character varying(40),
    created double precision NOT NULL,
    expires double precision,
    revoked double precision
);
CREATE TABLE public.attempts (
    id bigint NOT NULL,
    run character varying(40) NOT NULL,
    number integer NOT NULL,
    host character varying(255) NOT NULL,
    handle json NOT NULL,
    devices json NOT NULL,
    started double precision NOT NULL,
    ended double precision,
    code integer,
    failure character varying(20),
    reason text NOT NULL,
    saves integer NOT NULL,
    signalled double precision
);
CREATE SEQUENCE public.attempts_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.attempts_id_seq OWNED BY public.attempts.id;
CREATE TABLE public.audit (
    id bigint NOT NULL,
    "time" double precision NOT NULL,
    "user" character varying(100) NOT NULL,
    key character varying(16),
    action character varying(40) NOT NULL,
    run character varying(40),
    data json NOT NULL
);
CREATE SEQUENCE public.audit_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.audit_id_seq OWNED BY public.audit.id;
CREATE TABLE public.events (
    id bigint NOT NULL,
    run character varying(40) NOT NULL,
    "time" double precision NOT NULL,
    event character varying(40) NOT NULL,
    state character varying(20),
    data json NOT NULL
);
CREATE SEQUENCE public.events_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.events_id_seq OWNED BY public.events.id;
CREATE TABLE public.idempotency (
    "user" character varying(100) NOT NULL,
    key character varying(200) NOT NULL,
    body character varying(64) NOT NULL,
    run character varying(40) NOT NULL,
    created double precision NOT NULL
);
CREATE TABLE public.read_events (
    run character varying(40) NOT NULL,
    file character varying(400) NOT NULL,
    "offset" bigint NOT NULL
);
CREATE TABLE public.runs (
    seq bigint NOT NULL,
    id character varying(40) NOT NULL,
    kind character varying(20) NOT NULL,
    name character varying(200) NOT NULL,
    "user" character varying(100) NOT NULL,
    state character varying(20) NOT NULL,
    desired character varying(20) NOT NULL,
    priority integer NOT NULL,
    executor character varying(20) NOT NULL,
    spec json NOT NULL,
    "out" text,
    gpus integer NOT NULL,
    cores integer NOT NULL,
    failure character varying(20),
    reason text NOT NULL,
    attempt integer NOT NULL,
    fruitless integer NOT NULL,
    not_before double precision NOT NULL,
    created double precision NOT NULL,
    updated double precision NOT NULL,
    started double precision,
    ended double precision,
    progress json NOT NULL,
    parent character varying(40)
);
CREATE SEQUENCE public.runs_seq_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.runs_seq_seq OWNED BY public.runs.seq;
ALTER TABLE ONLY public.attempts ALTER COLUMN id SET DEFAULT nextval('public.attempts_id_seq'::regclass);
ALTER TABLE ONLY public.audit ALTER COLUMN id SET DEFAULT nextval('public.audit_id_seq'::regclass);
ALTER TABLE ONLY public.events ALTER COLUMN id SET DEFAULT nextval('public.events_id_seq'::regclass);
ALTER TABLE ONLY public.runs ALTER COLUMN seq SET DEFAULT nextval('public.runs_seq_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('0001');
INSERT INTO public.api_keys VALUES ('ef8eb55e42ba', 'ada', '34b5edd1be0227fcb25ac3f40496107f8c42d10a5c08c3a67d06f5779f1b3195', '["submit"]', NULL, 1795920735.405834, NULL, NULL);
INSERT INTO public.api_keys VALUES ('b6e2aea397c0', 'bob', '644cfbca98c855e3f1b6976feffa19b0ee0965214bee935081be85033eabe3cc', '["read"]', NULL, 1795920735.4620697, 1798512735.4620697, NULL);
INSERT INTO public.attempts VALUES (1, 'run-7319b2f25a07', 1, 'node-1', '{"submitted": 1795920735.56574}', '[]', 1795920735.56574, 1795920735.7294676, 0, NULL, '', 0, NULL);
INSERT INTO public.attempts VALUES (2, 'run-250408eaff72', 1, 'node-1', '{"submitted": 1795920735.9302707}', '[]', 1795920735.9302707, NULL, NULL, NULL, '', 0, NULL);
INSERT INTO public.audit VALUES (1, 1795920735.5148401, 'ada', 'ef8eb55e42ba', 'submit', 'run-7319b2f25a07', '{"kind": "train"}');
INSERT INTO public.events VALUES (1, 'run-7319b2f25a07', 1795920735.4899926, 'submitted', 'validating', '{"user": "ada", "kind": "train"}');
INSERT INTO public.events VALUES (2, 'run-7319b2f25a07', 1795920735.524726, 'queued', 'queued', '{}');
INSERT INTO public.events VALUES (3, 'run-7319b2f25a07', 1795920735.589469, 'start', 'starting', '{"attempt": 1, "host": "node-1", "devices": []}');
INSERT INTO public.events VALUES (4, 'run-7319b2f25a07', 1795920735.6448689, 'running', 'running', '{}');
INSERT INTO public.events VALUES (5, 'run-7319b2f25a07', 1795920735.674575, 'save', NULL, '{"step": 50}');
INSERT INTO public.events VALUES (6, 'run-7319b2f25a07', 1795920735.7771938, 'succeeded', 'succeeded', '{"attempt": 1}');
INSERT INTO public.events VALUES (7, 'run-6551c83556e6', 1795920735.7980692, 'submitted', 'validating', '{"user": "bob", "kind": "evaluate"}');
INSERT INTO public.events VALUES (8, 'run-6551c83556e6', 1795920735.8126748, 'refused', 'failed', '{"reason": "no model"}');
INSERT INTO public.events VALUES (9, 'run-250408eaff72', 1795920735.834782, 'submitted', 'validating', '{"user": "ada", "kind": "train"}');
INSERT INTO public.events VALUES (10, 'run-250408eaff72', 1795920735.8502853, 'queued', 'queued', '{}');
INSERT INTO public.events VALUES (11, 'run-250408eaff72', 1795920735.9452565, 'start', 'starting', '{"attempt": 1, "host": "node-1", "devices": []}');
INSERT INTO public.events VALUES (12, 'run-250408eaff72', 1795920736.0318477, 'running', 'running', '{}');
INSERT INTO public.events VALUES (13, 'run-e88375764eda', 1795920736.0412705, 'submitted', 'validating', '{"user": "ada", "kind": "evaluate"}');
INSERT INTO public.events VALUES (14, 'run-e88375764eda', 1795920736.0618799, 'queued', 'queued', '{}');
INSERT INTO public.events VALUES (15, 'run-98bb4bcf9f76', 1795920736.0809789, 'submitted', 'validating', '{"user": "ada", "kind": "train"}');
INSERT INTO public.events VALUES (16, 'run-98bb4bcf9f76', 1795920736.1829982, 'pause', 'paused', '{"user": "ada"}');
INSERT INTO public.events VALUES (17, 'run-1202bf3e4d8f', 1795920736.2412126, 'submitted', 'validating', '{"user": "ada", "kind": "evaluate"}');
INSERT INTO public.events VALUES (18, 'run-1202bf3e4d8f', 1795920736.2681408, 'cancel', 'cancelled', '{"user": "ada"}');
INSERT INTO public.idempotency VALUES ('ada', 'key-1', 'f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310', 'run-7319b2f25a07', 1795920735.4646664);
INSERT INTO public.read_events VALUES ('run-7319b2f25a07', '/lab/artifacts/run/events.jsonl', 120);
INSERT INTO public.runs VALUES (1, 'run-7319b2f25a07', 'train', 'done', 'ada', 'succeeded', 'running', 0, 'local', '{"job": {"kind": "train", "recipe": {"model": "artifacts/moe", "out": "artifacts/run", "steps": 100}, "ranks": null}, "name": "", "priority": 0, "cores": 1, "executor": "local"}', '/lab/artifacts/run', 0, 1, NULL, '', 1, 0, 0, 1795920735.4646664, 1795920735.7647965, 1795920735.56574, 1795920735.7534742, '{"step": 100, "steps": 100, "progressPercentage": 100.0, "metrics": {"loss": 2.5}, "saves": 2}', NULL);
INSERT INTO public.runs VALUES (2, 'run-6551c83556e6', 'evaluate', 'failed: ü <b>&''"', 'bob', 'failed', 'running', 0, 'local', '{"job": {"kind": "evaluate", "folder": "artifacts/moe"}, "name": "", "priority": 0, "cores": 1, "executor": "local"}', NULL, 0, 1, 'user_config', 'no model', 0, 0, 0, 1795920735.7841773, 1795920735.8098214, NULL, 1795920735.8051748, '{}', NULL);
INSERT INTO public.runs VALUES (3, 'run-250408eaff72', 'train', 'going', 'ada', 'running', 'running', 0, 'local', '{"job": {"kind": "train", "recipe": {"model": "artifacts/moe", "out": "artifacts/run", "steps": 100}, "ranks": null}, "name": "", "priority": 0, "cores": 1, "executor": "local"}', '/lab/artifacts/going', 0, 1, NULL, '', 1, 0, 0, 1795920735.8302891, 1795920736.0308237, 1795920735.9302707, NULL, '{}', NULL);
INSERT INTO public.runs VALUES (4, 'run-e88375764eda', 'evaluate', 'waiting', 'ada', 'queued', 'running', 2, 'local', '{"job": {"kind": "evaluate", "folder": "artifacts/moe"}, "name": "", "priority": 0, "cores": 1, "executor": "local"}', NULL, 0, 1, NULL, '', 0, 0, 0, 1795920736.0387053, 1795920736.0554876, NULL, NULL, '{}', NULL);
INSERT INTO public.runs VALUES (5, 'run-98bb4bcf9f76', 'train', 'paused', 'ada', 'paused', 'paused', 0, 'local', '{"job": {"kind": "train", "recipe": {"model": "artifacts/moe", "out": "artifacts/run", "steps": 100}, "ranks": null}, "name": "", "priority": 0, "cores": 1, "executor": "local"}', '/lab/artifacts/paused', 0, 1, NULL, '', 0, 0, 0, 1795920736.0686812, 1795920736.1732006, NULL, NULL, '{}', 'run-7319b2f25a07');
INSERT INTO public.runs VALUES (6, 'run-1202bf3e4d8f', 'evaluate', 'cancelled', 'ada', 'cancelled', 'cancelled', 0, 'local', '{"job": {"kind": "evaluate", "folder": "artifacts/moe"}, "name": "", "priority": 0, "cores": 1, "executor": "local"}', NULL, 0, 1, NULL, '', 0, 0, 0, 1795920736.2038984, 1795920736.262267, NULL, 1795920736.2620215, '{}', NULL);
SELECT pg_catalog.setval('public.attempts_id_seq', 2, true);
SELECT pg_catalog.setval('public.audit_id_seq', 1, true);
SELECT pg_catalog.setval('public.events_id_seq', 18, true);
SELECT pg_catalog.setval('public.runs_seq_seq', 6, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.attempts
    ADD CONSTRAINT attempts_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.attempts
    ADD CONSTRAINT attempts_run_number_key UNIQUE (run, number);
ALTER TABLE ONLY public.audit
    ADD CONSTRAINT audit_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT events_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.idempotency
    ADD CONSTRAINT idempotency_pkey PRIMARY KEY ("user", key);
ALTER TABLE ONLY public.read_events
    ADD CONSTRAINT read_events_pkey PRIMARY KEY (run, file);
ALTER TABLE ONLY public.runs
    ADD CONSTRAINT runs_id_key UNIQUE (id);
ALTER TABLE ONLY public.runs
    ADD CONSTRAINT runs_pkey PRIMARY KEY (seq);
CREATE INDEX events_of_run ON public.events USING btree (run, id);
CREATE UNIQUE INDEX one_writer ON public.runs USING btree ("out") WHERE ((state)::text <> ALL ((ARRAY['cancelled'::character varying, 'failed'::character varying, 'succeeded'::character varying])::text[]));
CREATE INDEX runs_by_state ON public.runs USING btree (state, "user", priority);
ALTER TABLE ONLY public.attempts
    ADD CONSTRAINT attempts_run_fkey FOREIGN KEY (run) REFERENCES public.runs(id);
ALTER TABLE ONLY public.events
    ADD CONSTRAINT events_run_fkey FOREIGN KEY (run) REFERENCES public.runs(id);
ALTER TABLE ONLY public.idempotency
    ADD CONSTRAINT idempotency_run_fkey FOREIGN KEY (run) REFERENCES public.runs(id);
ALTER TABLE ONLY public.read_events
    ADD CONSTRAINT read_events_run_fkey FOREIGN KEY (run) REFERENCES public.runs(id);
