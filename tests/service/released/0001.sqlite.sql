BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE api_keys (
	id VARCHAR(16) NOT NULL, 
	user VARCHAR(100) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	scopes JSON NOT NULL, 
	run VARCHAR(40), 
	created FLOAT NOT NULL, 
	expires FLOAT, 
	revoked FLOAT, 
	PRIMARY KEY (id)
);
INSERT INTO "api_keys" VALUES('12addd3f2e6e','ada','ce8634a59c559af29c9e11c2900142040ad3575f8149c3da42864dbf520ff0ca','["submit"]',NULL,1.79592073087394237516e+09,NULL,NULL);
INSERT INTO "api_keys" VALUES('f51cbde4b753','bob','b3e86a97d8188f452901b290afb727138779af125be492fd899dfb38bcf8899d','["read"]',NULL,1.79592073087773394582e+09,1.79851273087773394585e+09,NULL);
CREATE TABLE attempts (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	run VARCHAR(40) NOT NULL, 
	number INTEGER NOT NULL, 
	host VARCHAR(255) NOT NULL, 
	handle JSON NOT NULL, 
	devices JSON NOT NULL, 
	started FLOAT NOT NULL, 
	ended FLOAT, 
	code INTEGER, 
	failure VARCHAR(20), 
	reason TEXT NOT NULL, 
	saves INTEGER NOT NULL, 
	signalled FLOAT, 
	UNIQUE (run, number), 
	FOREIGN KEY(run) REFERENCES runs (id)
);
INSERT INTO "attempts" VALUES(1,'run-a0fd83ba60f4',1,'node-1','{"submitted": 1795920730.9435334}','[]',1.79592073094353342054e+09,1.79592073099917650226e+09,0,NULL,'',0,NULL);
INSERT INTO "attempts" VALUES(2,'run-be42204cf04b',1,'node-1','{"submitted": 1795920731.0430121}','[]',1.79592073104301214216e+09,NULL,NULL,NULL,'',0,NULL);
CREATE TABLE audit (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	time FLOAT NOT NULL, 
	user VARCHAR(100) NOT NULL, 
	"key" VARCHAR(16), 
	action VARCHAR(40) NOT NULL, 
	run VARCHAR(40), 
	data JSON NOT NULL
);
INSERT INTO "audit" VALUES(1,1.79592073092595219609e+09,'ada','12addd3f2e6e','submit','run-a0fd83ba60f4','{"kind": "train"}');
CREATE TABLE events (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	run VARCHAR(40) NOT NULL, 
	time FLOAT NOT NULL, 
	event VARCHAR(40) NOT NULL, 
	state VARCHAR(20), 
	data JSON NOT NULL, 
	FOREIGN KEY(run) REFERENCES runs (id)
);
INSERT INTO "events" VALUES(1,'run-a0fd83ba60f4',1.79592073089841246604e+09,'submitted','validating','{"user": "ada", "kind": "train"}');
INSERT INTO "events" VALUES(2,'run-a0fd83ba60f4',1.79592073092867422108e+09,'queued','queued','{}');
INSERT INTO "events" VALUES(3,'run-a0fd83ba60f4',1.79592073096065759653e+09,'start','starting','{"attempt": 1, "host": "node-1", "devices": []}');
INSERT INTO "events" VALUES(4,'run-a0fd83ba60f4',1.79592073098286271089e+09,'running','running','{}');
INSERT INTO "events" VALUES(5,'run-a0fd83ba60f4',1.79592073098542976379e+09,'save',NULL,'{"step": 50}');
INSERT INTO "events" VALUES(6,'run-a0fd83ba60f4',1795920731.01746,'succeeded','succeeded','{"attempt": 1}');
INSERT INTO "events" VALUES(7,'run-dd24a7939047',1.79592073101878046993e+09,'submitted','validating','{"user": "bob", "kind": "evaluate"}');
INSERT INTO "events" VALUES(8,'run-dd24a7939047',1.79592073102037072182e+09,'refused','failed','{"reason": "no model"}');
INSERT INTO "events" VALUES(9,'run-be42204cf04b',1.7959207310348877907e+09,'submitted','validating','{"user": "ada", "kind": "train"}');
INSERT INTO "events" VALUES(10,'run-be42204cf04b',1.79592073103734827044e+09,'queued','queued','{}');
INSERT INTO "events" VALUES(11,'run-be42204cf04b',1.79592073104349398606e+09,'start','starting','{"attempt": 1, "host": "node-1", "devices": []}');
INSERT INTO "events" VALUES(12,'run-be42204cf04b',1.79592073105113601686e+09,'running','running','{}');
INSERT INTO "events" VALUES(13,'run-f8685725fcef',1.79592073105237936972e+09,'submitted','validating','{"user": "ada", "kind": "evaluate"}');
INSERT INTO "events" VALUES(14,'run-f8685725fcef',1.79592073105372667307e+09,'queued','queued','{}');
INSERT INTO "events" VALUES(15,'run-0457aec2c2f6',1.79592073105830717085e+09,'submitted','validating','{"user": "ada", "kind": "train"}');
INSERT INTO "events" VALUES(16,'run-0457aec2c2f6',1.79592073106010437014e+09,'pause','paused','{"user": "ada"}');
INSERT INTO "events" VALUES(17,'run-5a455ce6530e',1.79592073106477761266e+09,'submitted','validating','{"user": "ada", "kind": "evaluate"}');
INSERT INTO "events" VALUES(18,'run-5a455ce6530e',1.79592073106661701204e+09,'cancel','cancelled','{"user": "ada"}');
CREATE TABLE idempotency (
	user VARCHAR(100) NOT NULL, 
	"key" VARCHAR(200) NOT NULL, 
	body VARCHAR(64) NOT NULL, 
	run VARCHAR(40) NOT NULL, 
	created FLOAT NOT NULL, 
	PRIMARY KEY (user, "key"), 
	FOREIGN KEY(run) REFERENCES runs (id)
);
INSERT INTO "idempotency" VALUES('ada','key-1','f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310','run-a0fd83ba60f4',1.79592073088656449314e+09);
CREATE TABLE read_events (
	run VARCHAR(40) NOT NULL, 
	file VARCHAR(400) NOT NULL, 
	"offset" INTEGER NOT NULL, 
	PRIMARY KEY (run, file), 
	FOREIGN KEY(run) REFERENCES runs (id)
);
INSERT INTO "read_events" VALUES('run-a0fd83ba60f4','/lab/artifacts/run/events.jsonl',120);
CREATE TABLE runs (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(40) NOT NULL, 
	kind VARCHAR(20) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	user VARCHAR(100) NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	desired VARCHAR(20) NOT NULL, 
	priority INTEGER NOT NULL, 
	executor VARCHAR(20) NOT NULL, 
	spec JSON NOT NULL, 
	out TEXT, 
	gpus INTEGER NOT NULL, 
	cores INTEGER NOT NULL, 
	failure VARCHAR(20), 
	reason TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	fruitless INTEGER NOT NULL, 
	not_before FLOAT NOT NULL, 
	created FLOAT NOT NULL, 
	updated FLOAT NOT NULL, 
	started FLOAT, 
	ended FLOAT, 
	progress JSON NOT NULL, 
	parent VARCHAR(40), 
	UNIQUE (id)
);
INSERT INTO "runs" VALUES(1,'run-a0fd83ba60f4','train','done','ada','succeeded','running',0,'local','{"job": {"kind": "train", "recipe": {"model": "artifacts/moe", "out": "artifacts/run", "steps": 100}, "ranks": null}, "name": "", "priority": 0, "cores": 1, "executor": "local"}','/lab/artifacts/run',0,1,NULL,'',1,0,0.0,1.79592073088656449314e+09,1.79592073100876927372e+09,1.79592073094353342054e+09,1.79592073100858211518e+09,'{"step": 100, "steps": 100, "progressPercentage": 100.0, "metrics": {"loss": 2.5}, "saves": 2}',NULL);
INSERT INTO "runs" VALUES(2,'run-dd24a7939047','evaluate','failed: ü <b>&''"','bob','failed','running',0,'local','{"job": {"kind": "evaluate", "folder": "artifacts/moe"}, "name": "", "priority": 0, "cores": 1, "executor": "local"}',NULL,0,1,'user_config','no model',0,0,0.0,1.79592073101821613316e+09,1.79592073101975369456e+09,NULL,1.7959207310195357799e+09,'{}',NULL);
INSERT INTO "runs" VALUES(3,'run-be42204cf04b','train','going','ada','running','running',0,'local','{"job": {"kind": "train", "recipe": {"model": "artifacts/moe", "out": "artifacts/run", "steps": 100}, "ranks": null}, "name": "", "priority": 0, "cores": 1, "executor": "local"}','/lab/artifacts/going',0,1,NULL,'',1,0,0.0,1.79592073103391575809e+09,1.79592073105096197132e+09,1.79592073104301214216e+09,NULL,'{}',NULL);
INSERT INTO "runs" VALUES(4,'run-f8685725fcef','evaluate','waiting','ada','queued','running',2,'local','{"job": {"kind": "evaluate", "folder": "artifacts/moe"}, "name": "", "priority": 0, "cores": 1, "executor": "local"}',NULL,0,1,NULL,'',0,0,0.0,1.79592073105186605455e+09,1.79592073105355167382e+09,NULL,NULL,'{}',NULL);
INSERT INTO "runs" VALUES(5,'run-0457aec2c2f6','train','paused','ada','paused','paused',0,'local','{"job": {"kind": "train", "recipe": {"model": "artifacts/moe", "out": "artifacts/run", "steps": 100}, "ranks": null}, "name": "", "priority": 0, "cores": 1, "executor": "local"}','/lab/artifacts/paused',0,1,NULL,'',0,0,0.0,1.79592073105773901943e+09,1.7959207310595021248e+09,NULL,NULL,'{}','run-a0fd83ba60f4');
INSERT INTO "runs" VALUES(6,'run-5a455ce6530e','evaluate','cancelled','ada','cancelled','cancelled',0,'local','{"job": {"kind": "evaluate", "folder": "artifacts/moe"}, "name": "", "priority": 0, "cores": 1, "executor": "local"}',NULL,0,1,NULL,'',0,0,0.0,1.7959207310641360283e+09,1.79592073106606125833e+09,NULL,1.79592073106596183777e+09,'{}',NULL);
CREATE INDEX runs_by_state ON runs (state, user, priority);
CREATE UNIQUE INDEX one_writer ON runs (out) WHERE state NOT IN ('cancelled', 'failed', 'succeeded');
CREATE INDEX events_of_run ON events (run, id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('runs',6);
INSERT INTO "sqlite_sequence" VALUES('events',18);
INSERT INTO "sqlite_sequence" VALUES('audit',1);
INSERT INTO "sqlite_sequence" VALUES('attempts',2);
COMMIT;
