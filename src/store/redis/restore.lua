-- Puts back a document that this server has lost, under the version it had. A
-- document that the server has is older only if the server itself went back in
-- time; such a one is replaced.
--
-- KEYS[1]  the key of the document
-- ARGV[1]  the whole document
-- ARGV[2]  its version
-- ARGV[3]  time to live in milliseconds, or '' for ever
-- ARGV[4]  the deadline: not executed when `now` is past it
-- ARGV[5]  '1' puts it back also where nothing is stored
-- ARGV[6]  bytes of the largest document that is looked at whole
-- ARGV[7]  the digest of the stored document, if its version was asked for, and
-- ARGV[8]  that version; see `look_up`
--
-- restored
-- kept      what is stored is not older, or cannot be read
-- absent    nothing is stored, and nothing was put back

local key, version = KEYS[1], ARGV[2]

if now > tonumber(ARGV[4]) then return reply('late') end
local found, err = look_up(key, tonumber(ARGV[6]), ARGV[7], ARGV[8])
if not found then return refuse(err, '') end
if found.whole then return reply('whole', found.whole) end
local older = found.exists and found.version and beyond(version, found.version)
if found.exists and not older then return reply('kept') end
if not found.exists and ARGV[5] ~= '1' then return reply('absent') end

local done
if ARGV[3] == '' then
  done = redis.pcall('SET', key, ARGV[1])
else
  done = redis.pcall('SET', key, ARGV[1], 'PX', ARGV[3])
end
if done.err then return refuse(done.err, '') end
return reply('restored')
