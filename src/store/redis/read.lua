-- Reads a document and when it expires, in one step.
--
-- KEYS[1]  the key of the document
--
-- read     {…, document, expiry in ms since 1970 or '-1'}
-- absent   nothing was there

local key = KEYS[1]
local document = redis.pcall('GET', key)
if type(document) == 'table' then return refuse(document.err, '') end
if not document then return reply('absent') end
local ttl = redis.call('PTTL', key)
return reply('read', document, ttl < 0 and '-1' or digits(math.floor(now / 1000) + ttl))
