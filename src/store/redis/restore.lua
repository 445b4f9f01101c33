-- Puts back a document that this server has lost, under the version it had: where
-- nothing is stored, or in place of one version.
--
-- KEYS[1]  the key of the document
-- ARGV[1]  the version that must be stored, or '' for none
-- ARGV[2]  the deadline: not executed when `now` is past it
-- ARGV[3]  the whole document
-- ARGV[4]  time to live in milliseconds, or '' for ever
-- ARGV[5]  bytes of the largest document that is looked at whole
-- ARGV[6]  the digest of the stored document, if its version was asked for, and
-- ARGV[7]  that version; see `look_up`
--
-- restored
-- kept      {…, version}: something else is stored; '0' if it cannot be read

local key = KEYS[1]

if now > tonumber(ARGV[2]) then return reply('late') end
local found, err = look_up(key, tonumber(ARGV[5]), ARGV[6], ARGV[7])
if not found then return refuse(err, '') end
if found.whole then return reply('whole', found.whole) end
local stored = found.exists and (found.version or '0') or ''
if stored ~= ARGV[1] then return reply('kept', stored) end

local done
if ARGV[4] == '' then
  done = redis.pcall('SET', key, ARGV[3])
else
  done = redis.pcall('SET', key, ARGV[3], 'PX', ARGV[4])
end
if done.err then return refuse(done.err, '') end
return reply('restored')
