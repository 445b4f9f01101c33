-- Reads a document and when it expires, in one step.
--
-- KEYS[1]  the key of the document
-- ARGV[1]  bytes of the largest document that is read
--
-- read     {…, document, expiry in ms since 1970 or '-1'}
-- absent   nothing was there

local key = KEYS[1]
local size = redis.pcall('STRLEN', key)
if type(size) == 'table' then return refuse(size.err, '') end
if size > tonumber(ARGV[1]) then return reply('larger', digits(size)) end
local document = redis.call('GET', key)
if not document then return reply('absent') end
local ttl = redis.call('PTTL', key)
return reply('read', document, ttl < 0 and '-1' or digits(math.floor(now / 1000) + ttl))
